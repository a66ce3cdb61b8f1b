"""A page on this machine on which a person decides what an audit or a clustering has found."""
