"""How right a model is on labelled rows, how sure it may be, and when it should abstain; knows no Ray."""
