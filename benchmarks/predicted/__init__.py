"""What a GPU would take, from what is counted without one."""
