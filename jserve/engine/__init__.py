"""The device shell: batch packing, programs, device state, executor, loop, worker process."""
