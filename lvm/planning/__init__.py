"""Planning: memory, collectives and roofline of a training step on devices that are not attached."""
