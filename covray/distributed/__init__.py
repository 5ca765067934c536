"""The only folder that imports ray: it moves data to the compute, and knows nothing of how the compute is done."""
