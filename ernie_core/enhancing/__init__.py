"""Having a prompt written out: what is asked for, what must not be lost, and what was asked before."""
