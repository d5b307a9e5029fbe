"""Rules that a composed config must keep, beyond its types; none of them imports torch."""
