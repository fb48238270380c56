"""The benchmark's offline tools: JSON calls in, the official tools' answers out (byte for byte)."""
