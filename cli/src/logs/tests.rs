use std::fs;
use std::io::Write;
use std::path::Path;

use clap::Parser;
use sidegate_mesh::access_log::is_unsafe;
use time::format_description::well_known::Rfc3339;

use super::*;

#[derive(Parser)]
struct Command {
    #[command(flatten)]
    logs: LogsArgs,
}

fn arguments(line: &str) -> LogsArgs {
    let words = std::iter::once("logs").chain(line.split_whitespace());
    Command::try_parse_from(words).unwrap().logs
}

fn access(time: &str, more: &str) -> String {
    format!("{{\"kind\":\"access\",\"time\":\"2026-11-24T{time}Z\",{more}}}\n")
}

const WEB: &str = "\"source\":\"spiffe://mesh.local/ns/shop/sa/web\"";
const ORDERS: &str = "\"destination\":\"spiffe://mesh.local/ns/shop/sa/orders\"";

/// What the sidecar of orders wrote.
fn orders_log() -> String {
    [
        access(
            "07:39:41.898000",
            &format!(
                "\"duration_ms\":1.204,\"direction\":\"inbound\",\"protocol\":\"http/1.1\",{WEB},{ORDERS},\
                 \"destination_service\":\"orders.shop:80\",\"method\":\"GET\",\"path\":\"/orders/7\",\"status\":200,\
                 \"decision\":\"allow\",\"policy\":\"shop/orders\",\"rule\":\"readers\",\"request_bytes\":0,\"response_bytes\":412"
            ),
        ),
        access(
            "07:39:41.903000",
            &format!(
                "\"duration_ms\":0.1,\"direction\":\"inbound\",\"protocol\":\"http/1.1\",\"source\":\"spiffe://mesh.local/ns/jobs/sa/batch\",\
                 {ORDERS},\"method\":\"GET\",\"path\":\"/orders/7\",\"status\":403,\"decision\":\"deny\",\"reason\":\"no rule admits\",\
                 \"request_bytes\":0,\"response_bytes\":96"
            ),
        ),
        "{\"kind\":\"diagnostic\",\"time\":\"2026-11-24T07:39:41.905Z\",\"level\":\"warn\",\"message\":\"svid rotation failed\"}\n".to_owned(),
        access(
            "07:39:42.500000",
            &format!(
                "\"duration_ms\":80.25,\"direction\":\"inbound\",\"protocol\":\"http/1.1\",{WEB},{ORDERS},\"method\":\"POST\",\
                 \"path\":\"/orders\",\"query\":true,\"status\":500,\"decision\":\"allow\",\"policy\":\"mesh/all\",\"rule\":\"any\",\
                 \"request_bytes\":9,\"response_bytes\":0"
            ),
        ),
        access(
            "07:39:42.700000",
            &format!(
                "\"duration_ms\":0.5,\"direction\":\"inbound\",\"protocol\":\"tcp\",\"source_address\":\"127.0.0.1\",{ORDERS},\
                 \"decision\":\"deny\",\"error\":\"tls_handshake\",\"reason\":\"expired\",\"flags\":[\"aggregated\"],\"count\":40"
            ),
        ),
    ]
    .concat()
}

/// What the sidecar of web wrote.
fn web_log() -> String {
    let grpc = "\"direction\":\"outbound\",\"protocol\":\"grpc\"";
    [
        access(
            "07:39:41.897000",
            &format!("\"duration_ms\":1.9,\"direction\":\"outbound\",\"protocol\":\"http/1.1\",{WEB},{ORDERS},\"method\":\"GET\",\"path\":\"/orders/7\",\"status\":200,\"response_bytes\":412"),
        ),
        access(
            "07:39:41.910000",
            &format!("\"duration_ms\":2.0,{grpc},{WEB},\"destination_service\":\"inventory.shop:80\",\"method\":\"POST\",\
                 \"path\":\"/shop.v1.Inventory/Reserve\",\"grpc_service\":\"shop.v1.Inventory\",\"grpc_method\":\"Reserve\",\
                 \"grpc_status\":14,\"status\":200,\"error\":\"upstream_connect\",\"reason\":\"connection refused\",\"response_bytes\":0"),
        ),
    ]
    .concat()
}

fn mesh() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let logs = folder.path().join("logs");
    fs::create_dir(&logs).unwrap();
    fs::write(logs.join("orders.log"), orders_log()).unwrap();
    fs::write(logs.join("web.log"), web_log()).unwrap();
    fs::write(logs.join("README"), "no log\n").unwrap();
    folder
}

fn shown(line: &str, colours: bool) -> String {
    let arguments = arguments(line);
    let mut out = Vec::new();
    let mut printer = Printer::new(&mut out, arguments.output, colours);
    let now = OffsetDateTime::parse("2026-11-24T07:39:43Z", &Rfc3339).unwrap();
    show_calls(&arguments, &mut printer, now).unwrap();
    String::from_utf8(out).unwrap()
}

fn of_mesh(line: &str) -> String {
    let mesh = mesh();
    shown(&format!("--dir {} {line}", mesh.path().display()), false)
}

/// The REQUEST and STATUS of each line but the first.
#[track_caller]
fn check(line: &str, expected: &[&str]) {
    let table = of_mesh(line);
    let found: Vec<String> = table
        .lines()
        .skip(1)
        .map(|line| {
            let cells: Vec<_> = line
                .split("  ")
                .filter(|cell| !cell.is_empty())
                .map(str::trim)
                .collect();
            format!("{} {}", cells[4], cells[5])
        })
        .collect();
    assert_eq!(found, expected, "{line}\n{table}");
}

#[test]
fn the_table_is_as_the_interface_draws_it() {
    assert_eq!(
        of_mesh(""),
        "\
TIME          DIR  CALLER      CALLED             REQUEST                    STATUS       DECISION                             MS    BYTES
07:39:41.898  in   shop/web    shop/orders        GET /orders/7              200          allow orders/readers                 1.2   412
07:39:41.903  in   jobs/batch  shop/orders        GET /orders/7              403          DENY no rule admits                  0.1   96
07:39:41.910  out  shop/web    inventory.shop:80  shop.v1.Inventory/Reserve  UNAVAILABLE  upstream_connect connection refused  2.0   0
07:39:42.500  in   shop/web    shop/orders        POST /orders?…             500          allow mesh/all/any                   80.2  0
07:39:42.700  in   127.0.0.1   shop/orders        handshake                  -            DENY tls_handshake expired ×40       0.5   -
"
    );
}

#[test]
fn each_call_is_shown_once_unless_asked_otherwise() {
    assert_eq!(of_mesh("").lines().count(), 1 + 5);
    assert_eq!(of_mesh("--direction in").lines().count(), 1 + 4);
    assert_eq!(of_mesh("--direction out").lines().count(), 1 + 2);
    assert_eq!(of_mesh("--direction all").lines().count(), 1 + 6);
    assert_eq!(
        of_mesh("--direction all --diagnostics").lines().count(),
        1 + 7
    );
    assert_eq!(
        of_mesh("web -n shop").lines().count(),
        1 + 2,
        "all that web's sidecar wrote"
    );
    assert_eq!(of_mesh("shop/orders").lines().count(), 1 + 4);
    assert_eq!(of_mesh("-n jobs").lines().count(), 1);
    let mesh = mesh();
    let file = mesh.path().join("logs/web.log");
    assert_eq!(
        shown(&format!("--file {}", file.display()), false)
            .lines()
            .count(),
        1 + 2
    );
}

#[test]
fn every_filter_filters() {
    let (get, post) = ("GET /orders/7 200", "POST /orders?… 500");
    let (denied, handshake) = ("GET /orders/7 403", "handshake -");
    let grpc = "shop.v1.Inventory/Reserve UNAVAILABLE";
    check("--denied", &[denied, handshake]);
    check("--errors", &[denied, grpc, post, handshake]);
    check("--from jobs/batch", &[denied]);
    check("--from web", &[get, grpc, post]);
    check(
        "--from spiffe://mesh.local/ns/shop/sa/web --method post",
        &[grpc, post],
    );
    check("--from spiffe://other/ns/shop/sa/web", &[]);
    check("--to inventory.shop", &[grpc]);
    check("--to inventory.shop:80", &[grpc]);
    check("--to orders --status 2xx", &[get]);
    check("--status 403 --status 5xx", &[denied, post]);
    check("--status grpc:14", &[grpc]);
    check("--status grpc:unavailable", &[grpc]);
    check("--method reserve", &[grpc]);
    check("--path /orders/*", &[get, denied]);
    check("--path /orders/**", &[get, denied, post]);
    check("--slower-than 50ms", &[post]);
    check("--since 1s", &[post, handshake]);
    check("--since 10m --denied --path /orders/*", &[denied]);
}

#[test]
fn wrong_usage_is_refused() {
    for line in [
        "--dir a --file b",
        "--dir a --context b",
        "--file a -A",
        "-A -n shop",
        "--dir a --status 9xx",
        "--dir a --status grpc:99x",
        "--dir a --since soon",
        "--dir a --status 99",
    ] {
        let words = std::iter::once("logs").chain(line.split_whitespace());
        assert!(Command::try_parse_from(words).is_err(), "{line}");
    }
    let arguments = arguments("shop/orders -n jobs --dir a");
    assert!(Filter::new(&arguments, OffsetDateTime::UNIX_EPOCH).is_err());
}

#[test]
fn a_folder_without_logs_is_an_error_that_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let error = |dir: &Path| Folder::open(dir).err().map(|error| format!("{error:#}"));
    assert!(error(folder.path()).unwrap().contains("no *.log"));
    assert!(
        error(&folder.path().join("logs"))
            .unwrap()
            .contains("cannot read")
    );
}

#[test]
fn a_broken_line_is_shown_in_its_place_and_steers_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a.log");
    let hostile = access(
        "07:00:02.000000",
        "\"method\":\"GET\",\"path\":\"/\\u001b]0;x\\u0007\\u202e\u{9b}2J\",\"status\":200",
    );
    let text = [
        access("07:00:01.000000", "\"method\":\"GET\",\"path\":\"/1\""),
        "panicked at \u{1b}[31m\u{202e}\n\n".to_owned(),
        hostile,
        "{\"kind\":\"access\",\"status\":\"what\"}\n".to_owned(),
        "{\"kind\":\"acc".to_owned(),
    ]
    .concat();
    fs::write(&file, text).unwrap();
    for format in ["table", "json", "yaml"] {
        let painted = shown(
            &format!("--file {} --denied -o {format}", file.display()),
            true,
        );
        assert!(painted.contains("broken"), "{painted}");
        assert_eq!(
            painted.matches("a.log").count(),
            3,
            "even under a filter: {painted}"
        );
        let plain = shown(&format!("--file {} -o {format}", file.display()), false);
        let bad: String = plain.matches(|c| is_unsafe(c) && c != '\n').collect();
        assert_eq!(bad, "", "{format}: {plain:?}");
    }
    let table = shown(&format!("--file {}", file.display()), false);
    let order: Vec<&str> = table
        .lines()
        .skip(1)
        .map(|line| line.split("  ").next().unwrap())
        .collect();
    assert_eq!(order[0], "07:00:01.000");
    assert!(
        order[1].contains("a.log:2: panicked at \\u001b[31m\\u202e"),
        "{table}"
    );
    assert_eq!(order[2], "07:00:02.000");
    assert!(
        table.contains("/\\u001b]0;x\\u0007\\u202e\\u009b2J"),
        "{table}"
    );
}

#[test]
fn json_is_the_lines_themselves_and_yaml_says_the_same() {
    let json = of_mesh("--status 200 -o json");
    assert_eq!(json, orders_log().lines().next().unwrap().to_owned() + "\n");
    let yaml = of_mesh("--status 200 -o yaml");
    assert!(
        yaml.starts_with("---\n") && yaml.contains("\nstatus: 200\n"),
        "{yaml}"
    );
}

#[test]
fn colours_are_only_where_they_were_asked_for() {
    let mesh = mesh();
    let line = format!("--dir {}", mesh.path().display());
    assert!(shown(&line, true).contains("\u{1b}[31mDENY no rule admits\u{1b}[0m"));
    assert!(!shown(&line, false).contains('\u{1b}'));
}

#[test]
fn a_very_long_request_does_not_break_the_table() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a.log");
    let path = "x".repeat(2000);
    fs::write(
        &file,
        access(
            "07:00:01.000000",
            &format!("\"method\":\"GET\",\"path\":\"/{path}\",\"status\":200"),
        ),
    )
    .unwrap();
    let table = shown(&format!("--file {}", file.display()), false);
    assert!(
        table.lines().all(|line| line.chars().count() < 200),
        "{table}"
    );
    assert!(table.contains("xxx…  200"), "{table}");
}

/// The texts that a folder has to give since the last time.
fn more(folder: &mut Folder) -> Vec<String> {
    let mut texts = Vec::new();
    folder.read(false, |raw| texts.push(raw.text)).unwrap();
    texts
}

fn append(path: &Path, text: &str) {
    let mut file = fs::OpenOptions::new()
        .append(true)
        .create(true)
        .open(path)
        .unwrap();
    file.write_all(text.as_bytes()).unwrap();
}

#[test]
fn following_sees_growth_new_files_rotation_and_truncation() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (dir.path().join("one.log"), dir.path().join("two.log"));
    append(&one, "1\n2\nhal");
    let mut folder = Folder::open(dir.path()).unwrap();
    assert_eq!(more(&mut folder), ["1", "2"], "half a line waits");
    append(&one, "f\n");
    append(&two, "new\n");
    assert_eq!(more(&mut folder), ["half", "new"]);
    assert!(more(&mut folder).is_empty());
    append(&one, "before\n");
    fs::rename(&one, dir.path().join("one.log.1")).unwrap();
    append(&one, "behind\n");
    let seen = more(&mut folder);
    assert_eq!(
        seen,
        ["before", "behind"],
        "nothing is lost between two files"
    );
    fs::write(&two, "").unwrap();
    assert!(more(&mut folder).is_empty());
    append(&two, "t\n");
    assert_eq!(more(&mut folder), ["t"]);
    append(&two, "last");
    fs::remove_file(&two).unwrap();
    assert_eq!(more(&mut folder), ["last"]);
    let mut tail = Folder::open(dir.path()).unwrap().near_end(4);
    append(&one, "12345\n67\n");
    assert_eq!(more(&mut tail), ["67"], "from the end, whole lines only");
}

#[test]
fn a_pipe_that_nobody_reads_is_no_failure() {
    struct Gone;
    impl Write for Gone {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mesh = mesh();
    let arguments = arguments(&format!("--dir {}", mesh.path().display()));
    let mut printer = Printer::new(Gone, Format::Table, false);
    let result = show_calls(&arguments, &mut printer, OffsetDateTime::UNIX_EPOCH);
    assert!(result.is_err());
    assert!(quiet(result).is_ok());
    assert!(quiet(Err(anyhow::anyhow!("else"))).is_err());
}
