"""Timing collectives: who is timed, how, and what is made of the figures."""
