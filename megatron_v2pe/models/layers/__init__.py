"""What layers are made of: linears and their adapters, norms, experts, element-wise operations; mcore's specs."""
