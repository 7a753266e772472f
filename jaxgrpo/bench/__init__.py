"""`bench`: what the sampler and the train step take, beside the least they could."""
