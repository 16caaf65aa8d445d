"""Messages that cross a process boundary: .proto files and the generated stubs."""
