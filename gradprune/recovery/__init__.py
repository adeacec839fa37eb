"""SMALLER MODEL -> BETTER SMALLER MODEL. Training a pruned model on text, or towards its dense teacher."""
