"""Studies: methods × seeds under an equal budget, each cell an ordinary run, and their comparison (`clae study`)."""
