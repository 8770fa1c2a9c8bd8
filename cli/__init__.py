"""The command line `trimtab`."""
