"""`python -m jserve` and the console script `jserve`."""

from jserve.launch import run

if __name__ == "__main__":
    run()
