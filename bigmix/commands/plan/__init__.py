"""What a recipe will do, told before a device is touched: counts, memory, disk, time, and what to
look at.
"""
