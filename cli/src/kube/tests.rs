use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::*;

const KUBECONFIG: &str = "
apiVersion: v1
kind: Config
current-context: one
clusters: [{ name: c, cluster: { server: 'http://127.0.0.1:1' } }]
users: [{ name: u, user: {} }]
contexts:
  - { name: one, context: { cluster: c, user: u } }
  - { name: two, context: { cluster: c, user: u, namespace: shop } }
";

fn arguments(context: Option<&str>) -> (tempfile::TempDir, ClusterArgs) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("config");
    std::fs::write(&file, KUBECONFIG).unwrap();
    let arguments = ClusterArgs {
        kubeconfig: Some(file),
        context: context.map(str::to_owned),
    };
    (folder, arguments)
}

#[tokio::test]
async fn the_context_decides_cluster_and_namespace() {
    let (_folder, one) = arguments(None);
    let cluster = Cluster::connect(&one).await.unwrap();
    assert_eq!(
        cluster.scope(None, false),
        Scope::Namespace("default".to_owned())
    );
    let (_folder, two) = arguments(Some("two"));
    let cluster = Cluster::connect(&two).await.unwrap();
    assert_eq!(
        cluster.scope(None, false),
        Scope::Namespace("shop".to_owned())
    );
    assert_eq!(
        cluster.scope(Some("jobs"), false),
        Scope::Namespace("jobs".to_owned())
    );
    assert_eq!(cluster.scope(None, true), Scope::All);
}

#[tokio::test]
async fn what_cannot_be_used_says_what_to_do() {
    let (_folder, unknown) = arguments(Some("three"));
    let error = Cluster::connect(&unknown).await.err().unwrap();
    assert_eq!(
        format!("{error:#}"),
        "the kubeconfig has no context `three`, only: one, two"
    );
    let missing = ClusterArgs {
        kubeconfig: Some("/nowhere/config".into()),
        context: None,
    };
    let error = format!("{:#}", Cluster::connect(&missing).await.err().unwrap());
    assert!(
        error.starts_with("the kubeconfig /nowhere/config cannot be used: "),
        "{error}"
    );
}

#[tokio::test]
async fn a_cluster_that_does_not_answer_is_named() {
    let (_folder, one) = arguments(None);
    let cluster = Cluster::connect(&one).await.unwrap();
    let selection = sidecars::Selection::new(&cluster, None, None, false).unwrap();
    let error = format!("{:#}", cluster.sidecars(&selection).await.unwrap_err());
    assert!(
        error.starts_with("listing pods: the cluster one cannot be reached: "),
        "{error}"
    );
    assert!(error.contains("Connection refused"), "{error}");
}

/// One head of HTTP.
async fn head_of(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    String::from_utf8(head).unwrap()
}

#[tokio::test]
async fn a_cluster_behind_a_proxy_is_asked_through_it() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (folder, arguments) = arguments(None);
    let proxy = format!("http://user:p%40ss@{}", listener.local_addr().unwrap());
    let cluster = format!("server: 'http://k8s.invalid:8080', proxy-url: '{proxy}'");
    let kubeconfig = KUBECONFIG.replace("server: 'http://127.0.0.1:1'", &cluster);
    std::fs::write(folder.path().join("config"), kubeconfig).unwrap();
    let cluster = Cluster::connect(&arguments).await.unwrap();
    let at = listener.local_addr().unwrap();
    assert_eq!(cluster.name, format!("one behind the proxy {at}"));
    let pods: Api<k8s_openapi::api::core::v1::Pod> = cluster.api(&Scope::All);
    let mut found = 0;
    let asking = cluster.list(&pods, "listing pods", |_| found += 1);
    let answering = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        let connect = head_of(&mut stream).await;
        stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
        let request = head_of(&mut stream).await;
        let body = r#"{"kind":"PodList","apiVersion":"v1","metadata":{},"items":[{"metadata":{"name":"a"}}]}"#;
        let length = body.len();
        let answer = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
        );
        stream.write_all(answer.as_bytes()).await.unwrap();
        (connect, request)
    };
    let (asked, (connect, request)) = tokio::join!(asking, answering);
    asked.unwrap();
    assert_eq!(found, 1);
    assert!(
        connect.starts_with("CONNECT k8s.invalid:8080 HTTP/1.1\r\n"),
        "{connect}"
    );
    let connect = connect.to_lowercase();
    assert!(
        connect.contains("proxy-authorization: basic dxnlcjpwqhnz\r\n"),
        "{connect}"
    );
    assert!(request.starts_with("GET /api/v1/pods"), "{request}");
    assert!(
        !request.to_lowercase().contains("proxy-authorization"),
        "{request}"
    );
}
