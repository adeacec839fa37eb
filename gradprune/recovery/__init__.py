"""SMALLER MODEL -> BETTER SMALLER MODEL. Training a pruned model, on its own or towards its dense teacher."""
