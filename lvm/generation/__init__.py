"""What `lvm.generate` is made of: weights laid out for writing, sampling, the compiled programs."""
