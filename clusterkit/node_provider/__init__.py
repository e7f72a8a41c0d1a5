"""Ray's side of the fleet: needs the standard library and Ray, and nothing else of the kit."""
