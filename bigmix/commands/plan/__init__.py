"""`bigmix plan`: what a recipe will do, before a device is used."""
