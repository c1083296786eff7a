"""A deployment in virtual time: the real router and the real engine loops; only steps and copies are predicted."""
