"""From image URIs to input pixels: fetch, decode and transform. Independent of models and Ray."""
