"""The machine: a catalogue of accelerators and offers, clusters by name or file, and a probe of this computer."""
