"""`python -m jserve` and the console script `jserve`."""

from jserve.launch.main import run

if __name__ == "__main__":
    run()
