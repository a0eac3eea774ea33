"""How right a model is on labeled rows, how sure it may be, and when it should abstain; knows no Ray."""
