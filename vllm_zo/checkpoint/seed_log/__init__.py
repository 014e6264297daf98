"""The seed log: its format, its header, its reader and its writer."""
