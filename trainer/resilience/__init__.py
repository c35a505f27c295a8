"""What a run does when something happens to it: signals, time limits, bad steps, hangs, crashes, restarts."""
