"""Steps that cost less: what is inherited from earlier ones, and what a trained feedback module supplies."""
