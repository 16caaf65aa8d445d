"""What crosses a process boundary: .proto files and the stubs generated from them."""
