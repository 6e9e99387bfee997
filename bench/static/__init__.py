"""These files read figures off the compiled code or count them without a GPU, and compare them with
committed baselines."""
