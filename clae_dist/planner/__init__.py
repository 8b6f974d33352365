"""`clae plan`: what a run will need and cost, before anything is started."""
