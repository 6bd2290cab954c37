// One WebSocket conversation: websocket.mjs ADDRESS HOST PATH MESSAGE.
// Prints the answer and exits 0, or prints the refusal's HTTP status and exits 1.
import WebSocket from "ws";

const [address, host, path, message] = process.argv.slice(2);
const socket = new WebSocket(`ws://${address}${path}`, { headers: { Host: host }, handshakeTimeout: 10_000 });
socket.on("open", () => socket.send(message));
socket.on("message", (data) => {
  console.log(data.toString());
  socket.close(1000);
});
socket.on("close", (code) => process.exit(code === 1000 ? 0 : 2));
socket.on("unexpected-response", (_request, response) => {
  console.log(`refused ${response.statusCode} ${response.headers["sidegate-decision"] ?? ""}`);
  process.exit(1);
});
socket.on("error", (error) => {
  console.log(`error ${error.message}`);
  process.exit(3);
});
