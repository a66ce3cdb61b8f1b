"""One process and its folder: rank and device, files that survive a crash, what a run says, how it ends."""
