"""The method `masks`: which units go is learned along whole sampling runs (EcoDiff, 2412.02852)."""
