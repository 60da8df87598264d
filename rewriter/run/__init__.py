"""The running model: installed, reported, verified, timed."""
