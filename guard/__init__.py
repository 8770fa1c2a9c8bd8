"""The runtime core of trimtab: carriers, exact mixing in a KL budget, the ledger, the gate."""
