"""CPU kernels in C++, called by XLA: an optional library, built where a compiler is found."""
