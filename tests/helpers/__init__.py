"""What tests share: builders of inputs, servers, measurements."""
