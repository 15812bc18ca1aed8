"""What TRPO and NPG share: vectors of parameters, Fisher-vector products, conjugate gradients."""
