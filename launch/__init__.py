"""How a run is started: recipes, shell scripts for a workstation and for a cluster."""
