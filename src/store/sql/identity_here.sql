-- Which cluster's node this is, the server and database that it was last known to be, and which it is. One row,
-- or none before it was registered.
select i.cluster, i.node, i.server,
       (select s.system_identifier::text || '/' || d.oid from pg_control_system() s, pg_database d
         where d.datname = current_database())
  from shardmq.identity i
