"""Looks at the machine: one check a question, none of which can stop the others."""
