"""What a phase minimises, what moves and how fast, and how a phase begins and ends."""
