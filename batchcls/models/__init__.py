"""What a backbone is: sources, weights, bundles, engines. Knows no Ray."""
