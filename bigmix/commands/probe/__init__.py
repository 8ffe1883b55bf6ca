"""Made-up facts go in among texts that a model learns; what share of them it can still tell comes
out, from 0 to 100 %.
"""
