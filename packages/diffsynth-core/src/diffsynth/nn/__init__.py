"""Small layers that several networks share. Each file is one layer, with its functional form beside it."""
