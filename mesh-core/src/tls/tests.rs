use rustls::pki_types::CertificateDer;
use rustls::{CipherSuite, NamedGroup};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use super::crl::Lists;
use super::revocation::Revocations;
use super::*;
use crate::certs::WorkloadCert;
use crate::identity::Identity;
use crate::test_ca::TestCa;

const CLIENT: &str = "spiffe://cluster.local/ns/payments/sa/api-gateway";
const SERVER: &str = "spiffe://cluster.local/ns/payments/sa/payment-service";

fn id(text: &str) -> Identity {
    text.parse().unwrap()
}

/// What each end makes of the other. A client knows the server's verdict only once it reads.
struct Met {
    client: Result<Identity, TlsError>,
    server: Result<Identity, TlsError>,
}

async fn meet(client: &WorkloadCert, server: &WorkloadCert, expected: &[Identity]) -> Met {
    let (near, far) = tokio::io::duplex(64 * 1024);
    let dialled = async {
        let (mut stream, peer) = client::connect(near, client, expected).await?;
        let read = stream.read_u8().await;
        match (read, stream.broken().reason()) {
            (Ok(_), None) => Ok(peer),
            (_, reason) => Err(reason.cloned().unwrap()),
        }
    };
    let accepted = async {
        let (mut stream, peer) = server::accept(far, server).await?;
        stream.write_all(b"x").await.unwrap();
        stream.flush().await.unwrap();
        Ok(peer)
    };
    let (client, server) = tokio::join!(dialled, accepted);
    Met { client, server }
}

#[tokio::test]
async fn each_side_learns_who_the_other_is() {
    let ca = TestCa::new();
    let met = meet(&ca.issue(CLIENT), &ca.issue(SERVER), &[id(CLIENT), id(SERVER)]).await;
    assert_eq!(met.client, Ok(id(SERVER)));
    assert_eq!(met.server, Ok(id(CLIENT)));
}

#[tokio::test]
async fn negotiates_the_first_choice() {
    let ca = TestCa::new();
    let (client, server) = (ca.issue(CLIENT), ca.issue(SERVER));
    let (near, far) = tokio::io::duplex(64 * 1024);
    let expected = [id(SERVER)];
    let (dialled, accepted) =
        tokio::join!(client::connect(near, &client, &expected), server::accept(far, &server));
    let first_choice = (Some(CipherSuite::TLS13_AES_256_GCM_SHA384), Some(NamedGroup::X25519MLKEM768));
    assert_eq!(dialled.unwrap().0.negotiated(), first_choice);
    assert_eq!(accepted.unwrap().0.negotiated(), first_choice);
}

#[tokio::test]
async fn a_client_refuses_servers_and_the_server_is_told() {
    let (ca, other) = (TestCa::new(), TestCa::new());
    let unexplained = || Err(TlsError::Ours(CertificateFault::Unexplained("CertificateUnknown".into())));
    let wrong =
        |actual: &str| CertificateFault::WrongIdentity { expected: vec![id(SERVER)], actual: id(actual) };
    for (server, fault, told) in [
        (
            ca.leaf(SERVER).valid(-7200, -3600),
            CertificateFault::Expired,
            Err(TlsError::Ours(CertificateFault::Expired)),
        ),
        (
            ca.leaf(SERVER).valid(3600, 7200),
            CertificateFault::NotYetValid,
            Err(TlsError::Ours(CertificateFault::Expired)),
        ),
        (
            other.leaf(SERVER).trusting(&ca),
            CertificateFault::UnknownIssuer,
            Err(TlsError::Ours(CertificateFault::UnknownIssuer)),
        ),
        (ca.leaf(CLIENT), wrong(CLIENT), unexplained()),
        (ca.leaf(SERVER).names(&[]), CertificateFault::NoIdentity, unexplained()),
    ] {
        let met = meet(&ca.issue(CLIENT), &server.issue(), &[id(SERVER)]).await;
        assert_eq!(met.client, Err(TlsError::Peer(fault)));
        assert_eq!(met.server, told);
    }
    let nobody = meet(&ca.issue(CLIENT), &ca.issue(SERVER), &[]).await;
    assert!(matches!(nobody.client, Err(TlsError::Peer(CertificateFault::WrongIdentity { .. }))));
}

#[tokio::test]
async fn a_server_refuses_clients_and_the_client_is_told() {
    let (ca, other) = (TestCa::new(), TestCa::new());
    let foreign = "spiffe://example.org/ns/payments/sa/api-gateway";
    let unexplained = || CertificateFault::Unexplained("CertificateUnknown".into());
    let wrong_domain = CertificateFault::WrongTrustDomain {
        expected: "cluster.local".parse().unwrap(),
        actual: id(foreign),
    };
    for (client, fault, told) in [
        (ca.leaf(CLIENT).valid(-7200, -3600), CertificateFault::Expired, CertificateFault::Expired),
        (ca.leaf(CLIENT).valid(3600, 7200), CertificateFault::NotYetValid, CertificateFault::Expired),
        (other.leaf(CLIENT).trusting(&ca), CertificateFault::UnknownIssuer, CertificateFault::UnknownIssuer),
        (ca.leaf(foreign), wrong_domain, unexplained()),
        (ca.leaf(CLIENT).names(&[]), CertificateFault::NoIdentity, unexplained()),
    ] {
        let met = meet(&client.issue(), &ca.issue(SERVER), &[id(SERVER)]).await;
        assert_eq!(met.server, Err(TlsError::Peer(fault)));
        assert_eq!(met.client, Err(TlsError::Ours(told)));
    }
}

/// Names that are not, or not alone, what they look like: each is refused at either end, whatever else is right.
#[tokio::test]
async fn odd_names_are_refused_by_either_side() {
    let ca = TestCa::new();
    let long = format!("spiffe://cluster.local/ns/payments/sa/{}", "a".repeat(254));
    let huge = format!("{SERVER}{}", "/x".repeat(5_000));
    let other = "spiffe://example.org/ns/a/sa/b";
    for (names, reason) in [
        (&[SERVER, CLIENT][..], "several_names"),
        (&[SERVER, SERVER], "several_names"),
        (&[SERVER, "https://example.com"], "several_names"),
        (&["spiffe://bad", SERVER], "several_names"),
        (&[other, SERVER], "several_names"),
        (&["https://example.com"], "bad_identity"),
        (&[""], "bad_identity"),
        (&["spiffe://cluster.local/ns/payments/sa/payment-service\0"], "bad_identity"),
        (&["spiffe://cluster.local\0.example.org/ns/payments/sa/payment-service"], "bad_identity"),
        (&["SPIFFE://cluster.local/ns/payments/sa/payment-service"], "bad_identity"),
        (&["spiffe://Cluster.Local/ns/payments/sa/payment-service"], "bad_identity"),
        (&["spiffe://cluster.local/NS/payments/SA/payment-service"], "bad_identity"),
        (&["spiffe://cluster.local/ns/payments/sa/payment%2Dservice"], "bad_identity"),
        (&["spiffe://cluster.local/ns%2Fpayments/sa/payment-service"], "bad_identity"),
        (&["spiffe://cluster.local/ns/../sa/payment-service"], "bad_identity"),
        (&["spiffe://cluster.local/ns/x/../payments/sa/payment-service"], "bad_identity"),
        (&["spiffe://cluster.local/./ns/payments/sa/payment-service"], "bad_identity"),
        (&["spiffe://cluster.local//ns/payments/sa/payment-service"], "bad_identity"),
        (&["spiffe://cluster.local/ns//sa/payment-service"], "bad_identity"),
        (&["spiffe://cluster.local/ns/payments/sa/payment-service/"], "bad_identity"),
        (&["spiffe://cluster.local/ns/payments/sa/payment-service?x"], "bad_identity"),
        (&["spiffe://cluster.local/ns/payments/sa/payment-service#x"], "bad_identity"),
        (&["spiffe://user@cluster.local/ns/payments/sa/payment-service"], "bad_identity"),
        (&["spiffe://cluster.local:443/ns/payments/sa/payment-service"], "bad_identity"),
        (&["spiffe:///ns/payments/sa/payment-service"], "bad_identity"),
        (&[" spiffe://cluster.local/ns/payments/sa/payment-service"], "bad_identity"),
        (&[long.as_str()], "bad_identity"),
        (&[huge.as_str()], "bad_identity"),
        (&["spiffe://cluster.local./ns/payments/sa/payment-service"], "wrong_trust_domain"),
        (&["spiffe://local/ns/payments/sa/payment-service"], "wrong_trust_domain"),
    ] {
        // The names that a certificate of its own trust domain may have are no other one's either.
        let at_client = if reason == "wrong_trust_domain" { "wrong_identity" } else { reason };
        let odd = || ca.leaf(SERVER).names(names).issue();
        let met = meet(&ca.issue(CLIENT), &odd(), &[id(SERVER)]).await;
        assert_eq!(met.client.unwrap_err().reason(), at_client, "{names:.80?}");
        let met = meet(&odd(), &ca.issue(SERVER), &[id(SERVER)]).await;
        assert_eq!(met.server.unwrap_err().reason(), reason, "{names:.80?}");
    }
}

/// What is on no list is believed; what is, at any place of the chain, is not, and hears why.
#[tokio::test]
async fn each_side_refuses_what_is_revoked() {
    let root = TestCa::new();
    let (ca, intermediate) = root.intermediate("intermediate");
    let refused = TlsError::Peer(CertificateFault::Revoked);
    let told = TlsError::Ours(CertificateFault::Revoked);
    for (lists, revokes_client, revokes_server) in [
        ((|_, _| Vec::new()) as fn(_, _) -> Vec<_>, false, false),
        (|client, _| vec![client], true, false),
        (|_, server| vec![server], false, true),
    ] {
        let (client, server) = (ca.issue(CLIENT), ca.issue(SERVER));
        let revocations = Revocations::new(revocation::Metrics::default());
        let of = |cert: &WorkloadCert| cert.chain()[0].clone();
        let revoked: Vec<CertificateDer<'_>> = lists(of(&client), of(&server));
        let list = ca.revoke(&revoked.iter().collect::<Vec<_>>());
        revocations.replace(Lists::parse(&list).unwrap());
        let checking = |cert: WorkloadCert| cert.checking(&revocations).unwrap();
        let met = meet(&checking(client), &checking(server), &[id(SERVER)]).await;
        let expected = match (revokes_client, revokes_server) {
            (true, _) => (Err(told.clone()), Err(refused.clone())),
            (_, true) => (Err(refused.clone()), Err(told.clone())),
            _ => (Ok(id(SERVER)), Ok(id(CLIENT))),
        };
        assert_eq!((met.client, met.server), expected);
    }
    // The whole chain counts: here the intermediate, for either side.
    let revocations = Revocations::new(revocation::Metrics::default());
    revocations.replace(Lists::parse(&root.revoke(&[&intermediate])).unwrap());
    let checking = |cert: WorkloadCert| cert.checking(&revocations).unwrap();
    let met = meet(&checking(ca.issue(CLIENT)), &ca.issue(SERVER), &[id(SERVER)]).await;
    assert_eq!((met.client, met.server), (Err(refused.clone()), Err(told.clone())));
    let met = meet(&ca.issue(CLIENT), &checking(ca.issue(SERVER)), &[id(SERVER)]).await;
    assert_eq!((met.client, met.server), (Err(told), Err(refused)));
}

/// The server's verdict on a client that is made by hand.
async fn accept_odd(
    client: rustls::ClientConfig,
    server: &WorkloadCert,
) -> (TlsError, Option<std::io::Error>) {
    let (near, far) = tokio::io::duplex(64 * 1024);
    let name = rustls::pki_types::ServerName::try_from("example.com").unwrap();
    let dial = async {
        let connector = tokio_rustls::TlsConnector::from(Arc::new(client));
        let mut stream = connector.connect(name, near).await?;
        stream.read_u8().await
    };
    let (dialled, accepted) = tokio::join!(dial, server::accept(far, server));
    (accepted.map(|(_, peer)| peer).unwrap_err(), dialled.err())
}

#[tokio::test]
async fn a_server_refuses_what_is_not_our_protocol() {
    let ca = TestCa::new();
    let server = ca.issue(SERVER);
    let blind = |versions: &[&'static rustls::SupportedProtocolVersion], alpn: &[&[u8]]| {
        let mut config = rustls::ClientConfig::builder_with_provider(aws_lc_rs::default_provider().into())
            .with_protocol_versions(versions)
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Trusting))
            .with_no_client_auth();
        config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        config
    };
    let tls13: &[&'static rustls::SupportedProtocolVersion] = &[&rustls::version::TLS13];
    let tls12: &[&'static rustls::SupportedProtocolVersion] = &[&rustls::version::TLS12];

    let (error, told) = accept_odd(blind(tls13, &[b"h2"]), &server).await;
    assert_eq!(error, TlsError::Peer(CertificateFault::NoCertificate));
    assert_eq!(
        told.map(|error| TlsError::from_io(&error)),
        Some(TlsError::Ours(CertificateFault::NoCertificate))
    );
    let (error, told) = accept_odd(blind(tls12, &[b"h2"]), &server).await;
    assert!(matches!(error, TlsError::Incompatible(_)), "{error}");
    assert!(matches!(TlsError::from_io(&told.unwrap()), TlsError::Incompatible(_)));
    let (error, _) = accept_odd(blind(tls13, &[b"http/1.1"]), &server).await;
    assert!(matches!(error, TlsError::Incompatible(_)), "{error}");
}

#[tokio::test]
async fn a_server_refuses_what_is_no_tls() {
    let server = TestCa::new().issue(SERVER);
    let (mut near, far): (DuplexStream, DuplexStream) = tokio::io::duplex(4096);
    near.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    near.shutdown().await.unwrap();
    let error = server::accept(far, &server).await.map(|(_, peer)| peer).unwrap_err();
    assert!(matches!(error, TlsError::NotTls(_)), "{error}");
    let (near, far) = tokio::io::duplex(4096);
    drop(near);
    assert_eq!(server::accept(far, &server).await.map(|(_, peer)| peer).unwrap_err(), TlsError::Closed);
}

/// Believes any server; only the server's verdict is of interest.
#[derive(Debug)]
struct Trusting;

impl rustls::client::danger::ServerCertVerifier for Trusting {
    fn verify_server_cert(
        &self,
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &[rustls::pki_types::CertificateDer<'_>],
        _: &rustls::pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        aws_lc_rs::default_provider().signature_verification_algorithms.supported_schemes()
    }
}
