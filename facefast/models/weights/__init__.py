"""Source weights as others publish them; hostile files stop here."""
