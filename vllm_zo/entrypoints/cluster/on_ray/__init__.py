"""Engines of a cluster as Ray actors. Nothing else imports Ray; what imports this must have called `require_ray`."""
