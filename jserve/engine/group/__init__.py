"""One engine over several processes: a leader streams each plan, followers run it."""
