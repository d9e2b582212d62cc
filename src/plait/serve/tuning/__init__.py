"""Settings that serve an artefact fastest here: searched, recorded, repeated."""
